"""What surrounds a method: options, runs, evaluation, SFT and reward model, rewards, samples.

    harness.main(Config, train)     the command line of a script: makes a Run, calls train(run), saves, prints

What train(run) finds in a Run is in run.py: run.steps, run.microbatches, run.log, run.evaluate.
"""
from common import CONTROL, UserError, warn
from harness.adapters import trained_weights
from harness.asking import ask
from harness.command_line import launch, main, start
from harness.conditioning import (add_tags, check_ratings, complete_request, label_errors, levels_by_rank,
                                  parse_request, quality_of, rated_rows, report_steering, reward_curve,
                                  steering, steering_metrics, table, trends, true_levels)
from harness.config import Config, option
from harness.evaluation import best_of, evaluate, held_out, probe
from harness.loading import (demonstrations, fingerprint, load_base, load_policy, load_scorer, load_task,
                             load_tokenizer, test_pool)
from harness.rewards import reward_to_maximise, set_scale, trained_path
from harness.run import Means, Run, what_initial_evaluation_needs
from harness.samples import (candidate_reward, candidates, given_answers, response_logps, rollout,
                             sample_rankings, score, score_metrics, scored, scored_demonstrations)
from harness.stages import Diverged, Recipe, check_finite, shuffled_batches, train_reward_model, train_sft
from tasks import Demonstration, Pair, Ranking, lock, write_json, write_text
from tasks.verifiable import rows_of_seed, verifiable_rows
