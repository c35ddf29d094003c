"""Simulate a CRISPR screen whose truth is known, with the noise of a real one."""

from __future__ import annotations

from biojepa.simulate.screen import ScreenFiles, simulate_screen
from biojepa.simulate.settings import PARAMETERS_FILE, ScreenParameters, SimulatorSettings

__all__ = ["PARAMETERS_FILE", "ScreenFiles", "ScreenParameters", "SimulatorSettings", "simulate_screen"]
