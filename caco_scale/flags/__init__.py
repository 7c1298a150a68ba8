"""Flags: what a field of a configuration or of a command may be, and how words of a command line become such fields.

    choices.py   the words that a field may have, for the configuration's types and for the mathematics alike
    rules.py     the rules that a field carries in its type
    suggest.py   what an unknown flag may have meant
    read.py      a command line to frozen dataclasses, by tyro: the one flag style of every command

It knows errors and nothing else: no command, no recipe.
"""
