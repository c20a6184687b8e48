"""What both ends of the contract need above the generated stubs.

- `tensors`: arrays to bytes and back.
- `policies`: selection policies, to and from messages.
- `learner_outputs`: what a learner sends under each loss and scoring, and how pair losses are tiled.
- `values`: enum names, durations, timestamps.
- `tracing`: spans that server and trainer share.
"""
