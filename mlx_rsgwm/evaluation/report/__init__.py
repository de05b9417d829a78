"""What people look at: summaries, pictures, the report folder and its page."""
