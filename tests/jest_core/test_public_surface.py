import jest_core


def test_the_package_exports_its_public_names_and_no_others():
    assert sorted(jest_core.__all__) == [
        "Embeddings",
        "ExampleLosses",
        "PairLosses",
        "Schedule",
        "Selection",
        "SelectionPolicy",
        "conditional_logits",
        "select_sub_batch",
        "selection_seed",
    ]
    assert all(hasattr(jest_core, name) for name in jest_core.__all__)
