"""One step's work as plain data: chosen rows, their layout in one array, sampling settings."""
