"""Known bugs put into a target's own backward, and which of them the check catches."""
