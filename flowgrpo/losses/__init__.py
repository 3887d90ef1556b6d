"""What an update minimises, one loss per file: quantities about actions in, a loss per action and what to log out."""
