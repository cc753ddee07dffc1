"""What a step must cost, what it costs, and the floor between machine and mathematics."""
