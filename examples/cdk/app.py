"""The monitor in a CDK app, as a nested stack, with an alarm topic of the app.

The template is the one of a release, after `sam package --template-file template.yaml
--s3-bucket BUCKET --output-template-file packaged.yaml`. Needs `pip install aws-cdk-lib`.
"""

import os
from typing import Any

from aws_cdk import App, CfnOutput, CfnStack, Stack
from aws_cdk import aws_sns as sns
from aws_cdk.aws_s3_assets import Asset
from constructs import Construct


class Shop(Stack):
    """The outputs of the monitor are attributes of its nested stack."""

    def __init__(self, scope: Construct, name: str, **properties: Any) -> None:
        super().__init__(scope, name, **properties)
        topic = sns.Topic(self, "Operations")
        template = Asset(self, "Template", path=os.environ.get("TEMPLATE", "packaged.yaml"))
        monitor = CfnStack(
            self,
            "Monitor",
            template_url=template.http_url,
            parameters={
                "BillingApiUrl": "https://billing.example.com/v1/paysession",
                "ApiKeySecretArn": os.environ["API_KEY_SECRET_ARN"],
                "DatabaseSecretArn": os.environ["DATABASE_SECRET_ARN"],
                "DatabaseTls": "VERIFY",
                "AlarmTopicArn": topic.topic_arn,
                "CheckCadence": "5s until 10m, 30s until 1h, 5m",
            },
        )
        CfnOutput(self, "PageUrl", value=monitor.get_att("Outputs.PageUrl").to_string())


if __name__ == "__main__":
    app = App()
    Shop(app, "Shop")
    app.synth()
