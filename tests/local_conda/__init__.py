"""A conda for tests, on the solver and installer of py-rattler and a channel of this very environment.

It executes ``snakemake --use-conda`` without any public channel: every environment file is parsed and
solved, every environment is created, activated, and holds what its file asks for and nothing else. So it
proves that the file of a rule suffices for the rule. It does not prove that the public channels carry
these versions, that their builds work together, or which of them (CUDA or not) a solver would choose.
"""
