"""What the layers do while a model trains: a monitor for any loop, its history, and Trainer's callback.

The callback is not imported here, because transformers' Trainer takes longer to import than all of ours.
"""
