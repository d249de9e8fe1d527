"""What the command is made of: data sets, reference networks, metrics and the training loop.

Holds: everything needed to reproduce a figure. Elsewhere: any part of the method.
"""
