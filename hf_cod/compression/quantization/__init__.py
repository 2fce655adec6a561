"""Three and four bits a weight: layers that matter less get three, the others bitsandbytes' NF4."""
