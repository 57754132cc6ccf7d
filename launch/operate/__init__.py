"""What people do with runs: submit, look, cancel, resume.

Entry points: `submit`, `control`, `board.look`, `status.state_of`.
"""
