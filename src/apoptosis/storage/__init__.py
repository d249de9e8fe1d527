"""Files written atomically, and JSON from files that may be damaged."""
