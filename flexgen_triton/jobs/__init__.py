"""Batch jobs: files of requests in the format of OpenAI, and answers that a crash does not lose."""
