"""What a run is told: settings, their checks, flags, files and recipes. Imports no torch."""
