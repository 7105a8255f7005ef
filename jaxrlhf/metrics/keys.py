"""Definitions of all metric keys. Log-probabilities, entropies and KL are in nats, lengths in tokens."""

PREFERENCES: dict[str, str] = {
    "rewards/chosen": "mean over pairs of the implicit reward of the chosen response; KTO: over rows with label true",
    "rewards/rejected": "mean over pairs of the implicit reward of the rejected response; KTO: rows with label false",
    "rewards/accuracies": "share of pairs whose chosen response has the higher implicit reward",
    "rewards/margins": "rewards/chosen - rewards/rejected",
    "logps/chosen": "mean over pairs (KTO: rows with label true) of log p(chosen), summed over its tokens, nats",
    "logps/rejected": "mean over pairs (KTO: rows with label false) of log p(rejected), summed over its tokens, nats",
    "rewards/baseline": "bco_pair: mean of the implicit rewards of all responses before this step",
    "pair_weights": "WPO: mean over pairs of the weight of the loss",
    "nll_loss": "SFT term before its weight: mean over tokens of chosen responses of -log p, nats",
    "log_odds_chosen": "ORPO: mean over pairs of the log odds ratio of chosen to rejected",
    "log_odds_ratio": "ORPO: mean over pairs of log sigmoid(log odds ratio)",
    "share/chosen": "KTO: share of rows with label true",
    "share/rejected": "KTO: share of rows with label false",
    "kl": "KTO: baseline, the mean log(policy / reference) of completions of other prompts, at least 0, nats",
    "beta": "beta of this step",
}
"""DPO and its relatives. Implicit reward: beta log(policy / reference), or without a reference beta log p per token."""

DISTILL: dict[str, str] = {
    "distill/on_policy": "1 if the student drew the completions of this step, 0 if they are those of the data",
    "distill/forward_kl": "mean over loss tokens of KL(teacher, student) over the vocabulary, nats",
    "distill/reverse_kl": "mean over loss tokens of KL(student, teacher) over the vocabulary, nats",
    "distill/teacher_entropy": "mean over loss tokens of the entropy of the teacher, nats",
    "distill/agreement": "share of loss tokens where the most probable token of student and teacher is the same",
}
"""Distillation, at `distill.temperature`."""

TIMES: dict[str, str] = {
    "training": "training: rollouts and optimizer steps, without the parts that have metrics of their own",
    "reward": "waiting for rewards",
    "evaluation": "evaluations, validations and samples",
    "compile": "tracing, lowering and compiling programs, or loading them from the cache",
    "save": "waiting for checkpoints; what is written in the background does not count",
    "restore": "reading checkpoints",
    "other": "anything else, such as writing the report",
}
"""Parts of the wall-clock time of a run. Those of a record add up to the time since the record before it, or since the
run was resumed; parts without any are missing."""

HELD_OUT = (
    "loss",
    "entropy",
    "ties",
    "absolute_error",
    "mean_reward",
    *(key for key in PREFERENCES if key not in ("beta", "rewards/baseline")),
)
METRICS: dict[str, str] = {
    # all trainers
    "epoch": "passes over the training rows so far",
    "epochs/NAME": "with data.mix, passes over the training rows of the data set NAME so far",
    "learning_rate": "learning rate of this step; PPO: of the policy",
    "grad_norm": "global norm of the gradient before clipping",
    "grad_norm_clipped": "global norm of the gradient after clipping",
    "num_tokens": "tokens in the loss of this step",
    "skipped_updates": "optimizer steps of this record that were skipped because loss or gradient was not finite",
    # mixtures of experts with a load-balancing loss
    "loss/router_aux": "load-balancing loss of the router before its weight, of the batch of an optimizer step: the "
    "number of experts per token if all have the same share",
    "router/largest_share": "share of the expert that was chosen most, in all layers together; at least 1 / number of "
    "experts",
    "loss/critic_router_aux": "PPO: `loss/router_aux` of the critic",
    "critic_router/largest_share": "PPO: `router/largest_share` of the critic",
    # SFT
    "loss": "SFT: mean over loss tokens of -log p (dft: of -p log p), nats; reward model: mean over rows of the "
    "training loss; DPO: mean over rows of the loss `dpo.loss`, plus the weighted SFT term; distillation: mean over "
    "loss tokens of the divergence of `distill.beta`, nats",
    "entropy": "mean over loss tokens of the entropy of the next-token distribution, nats",
    # reward model
    "accuracy": "share of pairs whose chosen response scores higher (labelled ties count as wrong); rankings: share of "
    "their pairs in order, mean over rankings; labels: share of responses whose score has the sign of the label",
    "margin": "mean over pairs of score(chosen) - score(rejected), 0 for a tie",
    "ties": "share of pairs that are labelled as ties",
    "absolute_error": "mean over scored responses of |score - target|",
    "min_reward": "minimum score over all responses of the batch",
    "mean_reward": "mean score over all responses of the batch (rankings: mean of the means of the rankings)",
    "max_reward": "maximum score over all responses of the batch",
    "eval/accuracy": "`accuracy` over all held-out rows except ties",
    "eval/margin": "`margin` over all held-out rows except ties",
    "eval/ece": "held-out rows: expected calibration error of sigmoid(chosen - rejected); labels: of sigmoid(score)",
    "eval/auc": "held-out labels: share of (good, bad) pairs where the good response scores higher, a tie counts half",
    "eval/correlation": "held-out scores: Pearson correlation of score and target",
    "eval/length_accuracy": "held-out rows: accuracy of preferring longer responses or shorter ones, the higher",
    # DPO and its relatives; online DPO logs rewards/... too
    **PREFERENCES,
    **{f"eval/{key}": f"`{key}` over all held-out rows" for key in HELD_OUT},
    # distillation
    **DISTILL,
    **{f"eval/{key}": f"`{key}` over all held-out rows" for key in DISTILL if key != "distill/on_policy"},
    # PPO and GRPO
    "objective/kl": "mean over sequences of the sum over response tokens of k1 = log pi_old - log ref, nats",
    "objective/kl_per_token": "mean over response tokens of k1, nats",
    "objective/kl_k3": "mean over sequences of the sum over response tokens of k3 = exp(-k1) - 1 + k1, nats; "
    "the same expectation as objective/kl, never negative",
    "objective/entropy_per_token": "mean over response tokens of the entropy of pi_old, nats",
    "objective/raw_scores": "mean over sequences of the score as the reward returned it",
    "objective/unscored": "share of responses without a score, which are no part of the update and its other metrics",
    "objective/score_length_correlation": "Pearson correlation over sequences of score and response length",
    "objective/kl_coef": "KL coefficient of this update, in the rewards or in the loss",
    "objective/entropy": "mean over sequences of the sum over response tokens of the entropy of pi_old, nats",
    "objective/non_score_reward": "mean over sequences of the sum of -kl_coef * k1; 0 with kl_in: loss",
    "objective/rlhf_reward": "mean over sequences of score - kl_coef * (sum over response tokens of k1), for any kl_in",
    "objective/scores": "mean over sequences of the score after the options of `scores`, plus per-token rewards",
    "objective/scores_std": "standard deviation over sequences of the score in objective/scores",
    "policy/approxkl_avg": "mean over response tokens and optimizer steps of 0.5 (log pi - log pi_old)^2",
    "policy/clipfrac_avg": "share of response tokens where clipping raises the policy loss, mean over optimizer steps",
    "policy/clipfrac_high_avg": "part of policy/clipfrac_avg with pi / pi_old above 1 + cliprange_high",
    "policy/clipfrac_low_avg": "part of policy/clipfrac_avg with pi / pi_old below 1 - cliprange",
    "policy/dual_clipfrac_avg": "share of response tokens limited by dual_clip, mean over optimizer steps",
    "policy/kl_avg": "mean over response tokens and optimizer steps of pi / pi_old - 1 - log(pi / pi_old), nats",
    "policy/steps": "mini-batches of this update; if target_kl ended it, the last one was measured but not trained on",
    "policy/trained": "share of response tokens in the policy loss, with grpo.top_entropy_quantile or clip_cov",
    "policy/penalised": "kl_cov: share of response tokens with a KL penalty",
    "policy/entropy_coef": "grpo.entropy_target: coefficient of the entropy bonus in this update, 0 above the target",
    "policy/entropy_avg": "mean over response tokens and optimizer steps of the entropy of the policy, nats",
    "loss/policy_avg": "policy loss (PPO's, or that of grpo.method), mean over response tokens and optimizer steps",
    "loss/value_avg": "clipped value loss, half the squared error, mean over response tokens and optimizer steps",
    "loss/kl_avg": "with kl_in: loss, mean over response tokens and optimizer steps of k2, pi / pi_old * k3 or exact",
    "val/clipfrac_avg": "share of response tokens where clipping raises the value loss, mean over optimizer steps",
    "val/ratio": "mean over response tokens and optimizer steps of pi / pi_old",
    "val/ratio_var": "variance over response tokens of pi / pi_old, mean over optimizer steps",
    "val/first_log_ratio_max": "maximum of |log pi - log pi_old| at the first optimizer step: 0 up to rounding",
    "val/log_ratio_max": "maximum over response tokens and optimizer steps of |log pi - log pi_old|",
    "val/sampler_logprob_gap": "mean over response tokens of |log pi_sampler - log pi_old|, nats",
    "val/sampler_logprob_gap_max": "maximum over response tokens of |log pi_sampler - log pi_old|, nats",
    "val/sampler_ratio_q01": "1 % quantile over response tokens of pi_old / pi_sampler",
    "val/sampler_ratio_q50": "median over response tokens of pi_old / pi_sampler",
    "val/sampler_ratio_q99": "99 % quantile over response tokens of pi_old / pi_sampler",
    "rollout/staleness": "with rollout.devices: updates between the policy that sampled and the one that trains",
    "val/sampler_corrected": "share of response tokens whose weight sampler_correction truncated or set to 0",
    "val/advantage_mean": "mean over response tokens of the advantage before whitening",
    "val/value_mean": "mean over response tokens of the value",
    "val/num_eos_tokens": "number of responses of the batch that ended with a stop token or stop string",
    "val/explained_variance": "1 - Var(returns - values) / Var(returns) over response tokens; 0 if returns do not vary",
    "policy/grad_norm": "global norm of the policy's gradient before clipping, mean over optimizer steps",
    "policy/grad_norm_clipped": "global norm of the policy's gradient after clipping, mean over optimizer steps",
    "critic/learning_rate": "learning rate of the critic, mean over optimizer steps",
    "critic/grad_norm": "global norm of the critic's gradient before clipping, mean over optimizer steps",
    "critic/grad_norm_clipped": "global norm of the critic's gradient after clipping, mean over optimizer steps",
    "tokens/mean_length": "mean response length, stop token included",
    "tokens/min_length": "minimum response length",
    "tokens/max_length": "maximum response length",
    "tokens/generated": "response tokens generated for this update, those of refills and greedy responses included",
    "tokens/finished": "share of responses that ended with a stop token or stop string; the others were truncated",
    "tokens/masked": "grpo.mask_truncated_completions: share of scored responses that were left out of the loss",
    "turns/mean": "with an environment: mean number of turns of the policy in a response",
    "turns/max": "with an environment: maximum number of turns",
    "turns/truncated": "with an environment: share of responses that were ended by environment.max_turns",
    "turns/overlong": "with an environment: share of responses that were ended by sampling.response_length",
    "turns/environment_tokens": "with an environment: mean number of its tokens in a response",
    "tokens/identical": "1 - (number of distinct responses) / (number of responses) of the batch",
    "eval/scores": "held-out prompts: mean score of a sampled response as the reward returned it (before `scores`)",
    "eval/scores_greedy": "held-out prompts: mean score of the greedy response",
    "eval/kl": "held-out prompts: mean over sampled responses of the KL to the reference, nats per response",
    "eval/win_rate": "held-out prompts: share whose sampled response scores higher than at step 0, a tie counts half",
    "eval/gain": "eval/scores minus its value at step 0",
    "eval/mean_length": "held-out prompts: mean length of a sampled response",
    "eval/finished": "held-out prompts: share of sampled responses that ended with a stop token or stop string",
    "eval/heldout_scores": "held-out prompts: mean score of a sampled response by validation.reward_model",
    "eval/heldout_gain": "eval/heldout_scores minus its value at step 0",
    "alarm/kl": "1 if the KL to the reference is over alarms.kl, else 0",
    "alarm/entropy": "1 if the entropy per token has collapsed (alarms.entropy), else 0",
    "alarm/length": "1 if the score follows the response length (alarms.length_correlation), else 0",
    "alarm/finished": "1 if far fewer responses finish than in the first record (alarms.finished), else 0",
    "alarm/held_out": "1 if since step 0 the held-out score rose and that of validation.reward_model fell, else 0",
    "alarm/gradient": "1 if the norm of the gradient is zero or vanishing, else missing",
    "alarm/scores": "1 if a statistic of the scores is not finite, else missing",
    "episode": "responses since the start of the run; of refills only those that replaced others",
    # GRPO and its relatives
    "groups/count": "number of groups (prompts) of the batch with a scored response",
    "groups/flat": "number of groups whose scores (after the options of `scores`) are all equal: advantages are 0",
    "groups/single": "number of groups with a single scored response",
    "groups/refills": "number of further rollouts of this update (grpo.max_refills)",
    "groups/replaced": "number of groups of equal scores that were replaced by groups of a refill",
    "groups/tied": "online DPO: number of groups whose best and worst score are equal: they form no pair",
    "objective/greedy_scores": "ReMax: mean score of the greedy responses that have one, as the reward returned it",
    "perf/response_tokens_per_second": "response tokens per second of generation (wall clock)",
    "perf/rollout_seconds": "wall-clock seconds of generation",
    "perf/rollout_wait_seconds": "seconds of them in which training waited, with rollout.devices",
    "perf/environment_seconds": "seconds of generation that the environment took",
    "perf/reward_seconds": "wall-clock seconds of scoring",
    **{f"perf/time/{part}": f"seconds since the record before that went to {what}" for part, what in TIMES.items()},
}
"""Definition of every key of a record. Only the timings, `perf/...`, differ between runs with equal configs."""

EPOCHS = "epochs/"
"""Prefix of the passes over each data set of a mixture."""

REWARDS = "rewards/"
"""Prefix of the metrics of one component of the score, `COMPONENT`."""

JUDGE = "perf/judge/"
"""Prefix of the metrics of what the scores of a judge took. They depend on what the run has asked before."""

COMPONENT: dict[str, str] = {
    "rewards/NAME/mean": "mean over the completions that the component NAME scored, before its weight",
    "rewards/NAME/std": "standard deviation over the completions that the component NAME scored, before its weight",
    "rewards/NAME/errors": "number of completions without a usable answer",
    "rewards/NAME/length_correlation": "Pearson correlation with the response length; 0 if either is constant",
    "rewards/NAME_unanswered/mean": "share of completions that the component left unscored",
    "rewards/NAME_truncated/mean": "share of completions too long for a reward model to read in full",
    "rewards/NAME_spread/mean": "mean of the standard deviation between the models of an ensemble",
    "perf/judge/NAME/requests": "number of answers from the server of the judge NAME for this update",
    "perf/judge/NAME/cached": "number of completions whose answer was known from before",
    "perf/judge/NAME/retries": "number of repeated attempts of these requests",
    "perf/judge/NAME/latency": "mean seconds from a request to its answer, pauses and repeated attempts included",
    "perf/judge/NAME/prompt_tokens": "tokens of the requests, as the server counted them (0 if it does not)",
    "perf/judge/NAME/generated_tokens": "tokens of the answers, as the server counted them",
    "perf/judge/NAME/cost": "price of these tokens by `input_price` and `output_price`",
}
"""PPO and GRPO. Those over scored completions are missing where there are none."""


def definition(key: str) -> str:
    """The definition of a metric: that of METRICS, or of COMPONENT, with the name of the component or data set; "" for
    an unknown key."""
    if key.startswith(EPOCHS):
        return METRICS[f"{EPOCHS}NAME"].replace("NAME", key.removeprefix(EPOCHS))
    prefix = JUDGE if key.startswith(JUDGE) else REWARDS
    name, _, part = key.removeprefix(prefix).rpartition("/")
    for suffix in ("_unanswered", "_truncated", "_spread", ""):
        general = f"{prefix}NAME{suffix}/{part}"
        if name.endswith(suffix) and general in COMPONENT:
            return METRICS.get(key) or COMPONENT[general].replace("NAME", name.removesuffix(suffix))
    return METRICS.get(key, "")
