"""The command, its data sets and training loop, the report and the launchers; nothing below imports them."""
