"""Environments: what the policy takes turns with, as episodes in this process or in one of their own.

An episode is one response. `episodes` runs them, `worker` in a process of their own, whose loop is `serve`;
`calculator` and `guess` are two environments.
"""
