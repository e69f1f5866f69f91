"""How low losses get: self-tuned runs against searches, and what single choices bring."""
