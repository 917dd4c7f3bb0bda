"""AWS services: secrets, events, and starting more workers."""
