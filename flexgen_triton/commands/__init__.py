"""The commands: all that parses flags, prints or reads the environment."""
