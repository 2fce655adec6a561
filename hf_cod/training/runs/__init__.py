"""One run of training: methods, Trainer, memory and its estimate, and whose directory it is."""
