# The monitor as a CloudFormation stack in Terraform. The template is the one of a release, after
# `sam package --template-file template.yaml --s3-bucket BUCKET --output-template-file packaged.yaml`.

terraform {
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.0"
    }
  }
}

variable "bucket" {
  description = "The bucket of `sam package`, in the stack's region."
  type        = string
}

variable "billing_api_url" {
  type = string
}

variable "api_key_secret_arn" {
  type = string
}

variable "database_secret_arn" {
  type = string
}

variable "alarm_topic_arn" {
  type = string
}

resource "aws_s3_object" "template" {
  bucket = var.bucket
  key    = "checkout-session-monitor/${filemd5("${path.module}/packaged.yaml")}.yaml"
  source = "${path.module}/packaged.yaml"
}

resource "aws_cloudformation_stack" "monitor" {
  name         = "checkout-session-monitor"
  template_url = "https://${var.bucket}.s3.amazonaws.com/${aws_s3_object.template.key}"
  capabilities = ["CAPABILITY_IAM", "CAPABILITY_AUTO_EXPAND"]

  parameters = {
    BillingApiUrl     = var.billing_api_url
    ApiKeySecretArn   = var.api_key_secret_arn
    DatabaseSecretArn = var.database_secret_arn
    DatabaseTls       = "VERIFY"
    AlarmTopicArn     = var.alarm_topic_arn
    CheckCadence      = "5s until 10m, 30s until 1h, 5m"
  }
}

output "page_url" {
  value = aws_cloudformation_stack.monitor.outputs["PageUrl"]
}

output "worker_name" {
  value = aws_cloudformation_stack.monitor.outputs["WorkerName"]
}
