"""Whether an edited model still computes on the channels it was edited for."""
