"""Durable queues for waits of hours, an engine a module. Each module needs the extra of its name."""
