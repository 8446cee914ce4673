"""The log, from an agent's side: events, publishing them once, the outbox, writes that are pending."""
