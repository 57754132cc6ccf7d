"""Where documents come from: files of every format, the Hub, conversations.

Entry points: `sources.open_source`, `text.SourceSpec`, `chat` (conversations), `template.render` (chat templates).
"""
