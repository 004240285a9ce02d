"""Programs to begin from: completion, a chatbot, questions about a table."""
