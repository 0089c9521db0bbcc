"""All of the admin surface, with vLLM's endpoints."""

from fastapi import APIRouter

from server.admin import adapters, operations, routing, tenants, vllm

router = APIRouter()
router.include_router(adapters.router, tags=["adapters"])
router.include_router(routing.router, tags=["routing"])
router.include_router(tenants.router, tags=["tenants"])
router.include_router(operations.router, tags=["operations"])
router.include_router(vllm.router, tags=["vLLM"])
