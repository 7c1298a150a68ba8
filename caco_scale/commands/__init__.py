"""The one command ``caco``: the table of all commands, and what makes a shell complete them.

A command is known by the name of its module, which is imported when it is asked for.
"""
