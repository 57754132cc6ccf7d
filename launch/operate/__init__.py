"""What users do with runs: submit, watch, cancel, resume.

Entry points: `submit`, `control`, `board.survey_runs`, `status.state_of`.
"""
