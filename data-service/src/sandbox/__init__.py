"""A loopback exchange: simulated or recorded markets behind the real exchanges' public protocols.

A program of its own: it imports nothing of the service but domain types and errors.
"""
