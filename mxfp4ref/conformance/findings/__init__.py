"""What a diagnosis is made of: where an output differs, since which stage, which named defect, and how it is told."""
