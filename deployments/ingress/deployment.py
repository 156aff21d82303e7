"""IngressDeployment: one ingress replica as a Ray Serve deployment."""

# Ray's own types are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import time
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from adapter_store.conversion.options import ConversionOptions
from adapter_store.names import AdapterRef
from adapter_store.open_store import open_store
from adapter_store.store import AdapterStore
from deployments.allocator import give_memory_back
from deployments.config import (
    AppConfig,
    ModelSection,
    endpoint_of,
    open_adapter_store,
    shared_namespaces,
)
from deployments.config_sections import INGRESS, AdaptersSection, ConvertSection
from deployments.fleet.budget_keeper import BudgetKeeper
from deployments.fleet.engine_link import EngineLink
from deployments.fleet.ledger_actor import ledger_call
from deployments.fleet.ledger_link import LedgerLink, OwnLedger, SharedLedger
from deployments.fleet.ray_connection import RayConnection
from deployments.fleet.timing import Timing
from deployments.ingress.adapter_texts import AdapterTexts
from deployments.ingress.admin import Admin
from deployments.ingress.asgi import Api
from deployments.ingress.browser_guard import BrowserGuard
from deployments.ingress.feedback import Feedback
from deployments.ingress.flips import Flips
from deployments.ingress.ingress import Ingress
from deployments.ingress.metering import Metering
from deployments.ingress.metrics import Metrics
from deployments.ingress.model_resolver import Models, ServedModel
from deployments.ingress.rollouts import Rollouts
from deployments.ingress.routes import build_api
from deployments.ingress.runtime_adapters import RuntimeAdapters
from deployments.ingress.tenant_limiter import TenantLimiter
from deployments.ingress.tool_format_rules import ToolFormatRule
from deployments.ingress.trials import Trials
from deployments.live_settings import reconfigured
from deployments.loopback_grpc import keep_grpc_on_loopback
from deployments.serve_logging import log_to_serves_file
from deployments.tenants.key_book import KeyBook
from deployments.tenants.tenants import Tenants, open_tenants
from deployments.text.answer_syntax import find_syntax
from deployments.text.embedding_use import find_embedding_use
from deployments.text.vocabulary import Vocabulary
from deployments.usage.meter import UsageMeter
from deployments.usage.open import open_meter, prices_of
from engine.gc_freeze import keep_what_is_loaded

ASK_S = 2.0  # for the other ingress replicas


@serve.ingress()  # pyright: ignore[reportUntypedClassDecorator, reportUnknownMemberType]
class IngressDeployment:
    """Runs before the engines do, so that /health can report that they do not."""

    def __init__(self, config: AppConfig, engines: dict[str, DeploymentHandle[Any]]) -> None:
        log_to_serves_file()
        keep_grpc_on_loopback()
        give_memory_back()
        models = [_open_model(config, model, engines[model.id]) for model in config.models]
        base_ids = [model.id for model in config.models]
        settings = config.ingress
        metrics = Metrics(settings.max_adapter_series, base_ids, settings.vllm_metrics)
        store = open_adapter_store(config.adapters)
        book = _key_book(config, store)
        tenants = open_tenants(config.tenancy, book, shared_namespaces(config.adapters))
        tenants.start()
        self._config, self._has_begun = config, False
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._rollouts = Rollouts(store, Flips(store), Trials(store, replica_id))
        link = _ledger_link(config)
        self._keeper = _keep_budgets(config, link)
        self._adapters = _runtime_adapters(config.adapters, store)
        self._meter = open_meter(config)
        self._meter.start()
        self._ingress = Ingress(
            Models(models, store, self._rollouts),
            AdapterTexts(store),
            tenants,
            TenantLimiter(metrics, link=link),
            metrics,
            config.ingress,
            int(time.time()),
            adapters=self._adapters,
            admin=_admin(config, store, tenants),
            metering=Metering(self._meter, time.time, prices_of(config.usage)),
            key_book=book,
        )
        if settings.replicas > 1:
            self._ingress.feedback = Feedback(metrics, _ask_others)
        if isinstance(self._meter, UsageMeter):
            metrics.show_usage(self._meter.read_counts)
        hosts = config.browser_hosts
        self._guard = None if hosts is None else BrowserGuard(hosts)
        keep_what_is_loaded()

    async def reconfigure(self, user_config: object, rank: object = None) -> None:
        """Take settings that change while requests run.

        Ray calls it at the start, too, and passes None only to those that ask for the rank.
        """
        config = reconfigured(self._config, INGRESS, user_config, self._has_begun)
        self._has_begun = True
        if config is None:
            return
        self._ingress.settings = config.ingress
        self._ingress.tenants.set_limits(config.tenancy.limits)
        adapters = config.adapters
        self._adapters.allow(adapters.load_from or (), _conversion(adapters.convert))

    async def take_feedback(
        self, tenant: str, answer_id: str, score: float, comment: str
    ) -> bool | None:
        """Count a score for an answer that this ingress replica gave, for another one."""
        return self._ingress.feedback.take(tenant, answer_id, score, comment)

    def __del__(self) -> None:
        """Flush and upload records: Ray calls it when it stops a replica in order."""
        if meter := getattr(self, "_meter", None):
            meter.close()

    async def adapters_for(self, model_id: str, newcomer: str) -> list[AdapterRef]:
        """Tell an engine replica that starts what it will be asked for."""
        return self._ingress.models.by_id[model_id].link.adapters_for(newcomer)

    def __serve_build_asgi_app__(self) -> Api:
        return build_api(self._ingress, self._guard, sends_request_id=False)


async def _ask_others(tenant: str, answer_id: str, score: float, comment: str) -> bool | None:
    """Ask every ingress replica to take a score; None if none of them gave the answer."""
    app = serve.get_replica_context().app_name
    ingress: Any = serve.get_deployment_handle("Ingress", app)
    answers = await ingress.broadcast(
        "take_feedback", tenant, answer_id, score, comment
    ).results_async(timeout_s=ASK_S, return_exceptions=True)
    return next((each for each in answers if isinstance(each, bool)), None)


def _key_book(config: AppConfig, store: AdapterStore) -> KeyBook | None:
    """Open the keys of the adapter store. Reads that hang are given up early: keys stay known."""
    adapters = config.adapters
    if not config.tenancy.keys_in_store:
        return None
    endpoint = endpoint_of(adapters, adapters.root)
    reader = open_store(adapters.root, endpoint, read_only=True, is_impatient=True)
    return KeyBook(store.objects, reader, not adapters.single_writer)


def _ledger_link(config: AppConfig) -> LedgerLink:
    """Reach the ledger of quotas: the ingresses' common one, or that of the only ingress."""
    if config.ingress.replicas == 1:
        return OwnLedger()
    replica_id = serve.get_replica_context().replica_id.unique_id
    adapters = config.adapters
    endpoint = endpoint_of(adapters, adapters.root)
    call = ledger_call(adapters.root, endpoint, not adapters.single_writer)
    link = SharedLedger(call, replica_id, config.ingress.replicas)
    link.start()
    return link


def _keep_budgets(config: AppConfig, link: LedgerLink) -> BudgetKeeper | None:
    """Begin to keep what is spent of budgets; the common ledger does so itself."""
    if not isinstance(link, OwnLedger):
        return None
    adapters = config.adapters
    store = open_store(adapters.root, endpoint_of(adapters, adapters.root), read_only=True)
    keeper = BudgetKeeper(store, link.ledger, not adapters.single_writer)
    keeper.start()
    return keeper


def _runtime_adapters(adapters: AdaptersSection, store: AdapterStore) -> RuntimeAdapters:
    scratch, endpoint = Path(adapters.disk_path), endpoint_of(adapters)
    return RuntimeAdapters(
        store,
        adapters.load_from or (),
        scratch,
        adapters.disk_bytes,
        endpoint,
        _conversion(adapters.convert),
    )


def _admin(config: AppConfig, store: AdapterStore, tenants: Tenants) -> Admin | None:
    if not config.admin.enabled:
        return None
    scratch = Path(config.adapters.disk_path) / ".uploads"
    return Admin(store, tenants, config.admin, scratch, endpoint_of(config.adapters))


def _conversion(wanted: ConvertSection) -> ConversionOptions | None:
    if not wanted.enabled:
        return None
    return ConversionOptions(wanted.rank, wanted.max_residual, limit_s=wanted.limit_s)


def _link_to(engine: DeploymentHandle[Any], config: AppConfig, model: ModelSection) -> EngineLink:
    """Make a link to the model's replicas, of which there may be none."""
    replica_id, replicas = serve.get_replica_context().replica_id.unique_id, model.replicas
    if replicas.min:
        return EngineLink(RayConnection(engine), replica_id)
    patience_s = max(Timing().patience_s, replicas.hold_s)
    timing = Timing(patience_s=patience_s, hold_s=replicas.hold_s)
    return EngineLink(RayConnection(engine), replica_id, timing, config.ingress.max_queued_requests)


def _open_model(
    config: AppConfig, model: ModelSection, engine: DeploymentHandle[Any]
) -> ServedModel:
    vocabulary = Vocabulary.load(Path(model.source), model.tokenizer)
    link = _link_to(engine, config, model)
    link.start()
    most = model.replicas.most
    syntax = find_syntax(vocabulary, model.id, model.tool_format, model.reasoning_format)
    wanted = model.embeddings
    embeddings = find_embedding_use(Path(model.source), wanted.pooling, wanted.normalize)
    num = config.max_answers(model) * most
    adapters = model.engine.max_num_seqs * most
    return ServedModel(
        model.id,
        vocabulary,
        link,
        num,
        syntax,
        embeddings,
        adapters,
        model.generation_config != "none",
        [ToolFormatRule(rule.adapter, rule.tool_format) for rule in model.adapter_tool_formats],
        Path(model.source),
    )
