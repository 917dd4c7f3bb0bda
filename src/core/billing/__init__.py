"""The billing service: requests, their transport, and what the words of an answer mean."""
