"""A run as one HTML page that needs no network.

Entry points: `page.write_report`; `chart` draws every figure.
"""
