"""Base models and adapters: their folders, their checks, and how adapters sit on a base in memory."""
