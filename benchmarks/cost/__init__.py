"""What a step costs in time and memory, beside plain loops on the same nets."""
