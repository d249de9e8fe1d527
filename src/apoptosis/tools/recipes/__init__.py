"""What the command is made of: data sets, reference networks, metrics and the training loop.

Lives here: everything needed to reproduce a figure. Does not live here: any part of the method.
"""
