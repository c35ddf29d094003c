"""Score predictions of held-out perturbations against half of their cells, and say what that shows."""
