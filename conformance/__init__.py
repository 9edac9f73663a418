"""The conformance suite: properties of the spec, run against any backend, ours or a third party's."""
