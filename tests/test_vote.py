from nanodistill.vote import Vote, labels, majority, plurality, self_scores, summary, together


def test_majority_wins_and_missing_answers_count_against_agreement():
    assert majority(["24", "24", None, "7"]) == Vote("24", 0.5, 4)


def test_a_tie_or_a_low_agreement_drops_the_question():
    assert majority(["1", "2", "2", "1", "3"]) == Vote(None, 0.4, 5)
    assert majority(["1", "2", "2", "4", "3"], min_agreement=0.5).answer is None
    assert majority(["1", "2", "2", "4"], min_agreement=0.5).answer == "2"
    assert majority([None, None]) == Vote(None, 0.0, 2)


def test_plurality_names_every_answer_that_ties_for_the_first_place():
    assert plurality(["7", "24", None, "24"]) == ["24"]
    assert plurality(["1", "2", "3", "2", "1"]) == ["1", "2"]
    assert plurality(["b", "a"]) == ["b", "a"]
    assert plurality([]) == plurality([None, None]) == []


def test_a_missing_answer_never_wins_nor_ties():
    assert plurality([None, None, None, "5"]) == ["5"] and plurality([None, "5"]) == ["5"]
    assert plurality(["", None, None]) == [""]                            # an answer, if an odd one
    assert majority([None, None, None, "5"]) == Vote("5", 0.25, 4)
    assert majority([None, "5", None, "6"]) == Vote(None, 0.25, 4)
    assert majority([]) == Vote(None, 0.0, 0)
    assert majority(["5", None], 0.5).answer == "5" and majority(["5", None], 0.51).answer is None


def test_two_groups_have_the_same_say_whatever_their_sizes():
    # By hand: of six parts 5 has 2 + 0, 7 has 1 + 3 of two groups of three.
    assert together(["5", "5", "7"], ["7"]) == Vote("7", 4 / 6, 6)
    assert together(["5", "5"], ["7", None, None]) == Vote("5", 0.5, 12)
    assert together(["5"], ["7"]).answer is None
    assert together(["5", "6", "5"], []) == majority(["5", "6", "5"])
    assert together([], []) == Vote(None, 0.0, 0)


def test_labels_follow_the_vote():
    assert labels(["24", None, "7"], Vote("24", 0.5, 4)) == [True, False, False]
    assert labels(["24", None], Vote(None, 0.4, 5)) == [None, None]


def test_summary():
    votes = [Vote("1", 0.5, 4), Vote("2", 1.0, 4), Vote(None, 0.2, 4), Vote(None, 0.4, 4)]
    assert summary(votes) == {"kept": 0.5, "agreement": 0.75}


def test_shares_of_the_first_place_by_hand():
    """A tie of two is half each; a response without an answer leads nothing, however many."""
    assert self_scores(["7", "8", "7", None]) == [1, 0, 1, 0]
    assert self_scores(["7", "8", "8", "7", "9"]) == [0.5, 0.5, 0.5, 0.5, 0]
    assert self_scores([None, None, "3"]) == [0, 0, 1] and self_scores([None]) == [0]
