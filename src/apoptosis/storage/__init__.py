"""Files written whole or not at all, and JSON from files that may be damaged."""
