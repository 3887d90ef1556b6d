"""Pure mathematics: torch only, no diffusers, no input or output."""
