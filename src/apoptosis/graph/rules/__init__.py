"""What every operator does with channels."""
