"""What a training step must cost, what it costs, and the error of each precision.

May import: training, and what training may import.
A new file: a measurement of a step.
"""
