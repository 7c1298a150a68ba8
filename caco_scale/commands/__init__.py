"""The one command ``caco``: the table of all commands, and what makes a shell complete them.

A command is known by the name of its module, which is imported when it is asked for. No command imports torch, nor what
imports it, before its flags are read and the places that they name are looked at: help and mistakes are answered at
once.
"""
