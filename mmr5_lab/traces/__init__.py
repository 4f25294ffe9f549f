"""Training data: teachers, answers paid for, checks, formats."""
