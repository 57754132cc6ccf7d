"""Batches of a rank: from prepared rows or straight from sources, and the state a run resumes from.

Entry points: `loader.Loader`, `stream`, `resume_state.make_record`.
"""
