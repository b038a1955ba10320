"""What an epoch of a recipe costs, before it is run: counts, memory, time and advice."""
