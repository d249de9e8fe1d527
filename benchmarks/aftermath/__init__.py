"""What a removal costs after training has gone on: trials over a bank of tasks, against the untouched twin."""
